"""Pictures and videos, from whatever is handed over to ``pixel_values``.

sources    one image, several, or ``pixel_values``
decode     a path, bytes or an array to upright RGB pixels
transform  pixels to what a vision graph takes; start here
video      frames of a video
"""
