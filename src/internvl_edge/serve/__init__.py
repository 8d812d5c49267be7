"""An HTTP server for compiled directories: OpenAI's routes, a page to try them on, metrics.

    options  what ``internvl-edge serve`` can be told, and what it refuses
    service  the models that are served, and what every request shares
    server   uvicorn: the socket, slow connections, SIGTERM;  app  all routes as one application
    routes   a module for each kind of request; start here
    models   a directory as requests use it: batches, chats
    http     bodies, fields, errors, keys and metrics
    static   the page, and ``openapi.json``

It imports Starlette, uvicorn and prometheus-client, which the extra ``serve`` installs, and neither
torch nor onnx. Only bytes of pictures, never a client's string, reach the runtime as an image.
"""
