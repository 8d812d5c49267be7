# The server on a processor: docker build -t internvl-edge .
#
#     docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/compiled:/models/compiled:ro" \
#         -v "$PWD/key:/run/secrets/internvl-edge/key:ro" internvl-edge
#
# Other commands work too: docker run --rm internvl-edge doctor. Debian's and Python's fixes come with
# the base's tag; who wants the same bytes each time names a digest: --build-arg BASE=python@sha256:…
ARG BASE=python:3.13-slim-bookworm

FROM ${BASE} AS build
WORKDIR /source
COPY . .
ARG EXTRAS=ort,chat,serve
RUN python -m venv /opt/internvl-edge \
    && /opt/internvl-edge/bin/pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"

FROM ${BASE}
COPY --from=build /opt/internvl-edge /opt/internvl-edge
ENV PATH=/opt/internvl-edge/bin:$PATH PYTHONUNBUFFERED=1
RUN groupadd --gid 10001 internvl && useradd --uid 10001 --gid 10001 --no-create-home internvl
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Without Kubernetes, whose probes ask the same.
HEALTHCHECK --interval=5s --timeout=4s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=3)"]
ENTRYPOINT ["internvl-edge"]
CMD ["serve", "/models/compiled", "--host", "0.0.0.0", "--api-key-file", "/run/secrets/internvl-edge/key"]
