"""Pictures and videos, from whatever is handed over to ``pixel_values``.

sources    one image, several, a stream of them, or ``pixel_values``
decode     a path, URL, bytes, file or array to upright RGB pixels;  reading  its bytes
formats    the file formats that are decoded;  arrays  the arrays that are pictures
folder     the pictures of a folder
options    what stands under transparency, and how large pictures may be
transform  pixels to what a vision graph takes; start here;  resize  as Pillow does, in part
video      frames of a video
"""
