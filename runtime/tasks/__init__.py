"""The tasks that people ask of a model, as functions on its open components.

embed     images, texts and videos to vectors; start here
compare   classification, retrieval and matching
caption   text about images;  chat  conversations;  chat_images  their images;
          chat_prompt  how they are spelled;  chat_decoder  ids after ids
keywords  names of arguments that other libraries have
vectors   unit length, softmax, order
"""
