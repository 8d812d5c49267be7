"""What people ask of a model, as functions on its open components.

embed     images, texts and videos to vectors; start here
caption   text about images;  chat  conversations
requests  what callers hand over, as lists and arrays
vectors   unit length, softmax, order
"""
