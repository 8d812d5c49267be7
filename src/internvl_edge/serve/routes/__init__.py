"""What the server answers, a module for each kind of request.

embeddings  texts and images as vectors, in the dialects of four APIs; start here
compare     zero-shot classification and reranking
chat        text about images, whole or streamed;  messages  its conversation
listing     models, health, metrics
gallery     a folder of pictures to search;  page  the page
"""
