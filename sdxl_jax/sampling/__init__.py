"""From prompts to images: options, the plan of the denoising schedule, and the programs that the devices run."""
