"""`sdxl-jax serve`: a page on which images are drawn.

    studio   what the page can do, without a page: draw, stop, tell how far it is, keep what was drawn
    page     the page, of NiceGUI: fields, buttons, the image, the images before it

How an image is said as a command line is the business of `commands/serve.py`, which gives it to the studio.
"""
