"""`sdxl-jax serve`: a web page to sample images on.

    session   what the page does, without a page: run requests, stop them, report progress, keep the results
    page      the page, of NiceGUI: fields, buttons, the current image, the images before it

The command line that repeats an image is made by `commands/serve.py`, which passes the function to the session.
"""
