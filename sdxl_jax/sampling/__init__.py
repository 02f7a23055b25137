"""From prompts to images: what can be asked for, the plan of a request, the programs on the devices."""
