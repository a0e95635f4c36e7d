# docker build -t mechscope .                                            the model is fetched at first use, into /data
# docker build -t mechscope --build-arg MODEL=smollm2-135m-instruct .    the model is part of the image
#
# docker run -i --rm -v mechscope:/data mechscope                        MCP over stdio
# docker run --rm --network host -v mechscope:/data mechscope serve --http --port 8765
#                                                                        MCP over HTTP, on the host's localhost only
# docker run --rm -v mechscope:/data mechscope doctor
#
# tests/dockerfile.py runs these instructions without Docker.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY engine engine
COPY schemas schemas
COPY server server
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .
RUN python -m venv /opt/mechscope \
    && /opt/mechscope/bin/python -m pip install --no-cache-dir /wheels/*.whl

FROM python:${PYTHON}-slim
ARG MODEL=
ENV PATH=/opt/mechscope/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/data/cache \
    XDG_DATA_HOME=/data/share \
    HF_HOME=/data/huggingface
RUN useradd --uid 10001 --no-create-home --home-dir /data mechscope \
    && mkdir /data && chown mechscope:mechscope /data
COPY --from=build /opt/mechscope /opt/mechscope
USER mechscope
WORKDIR /data
RUN if [ -n "$MODEL" ]; then mechscope fetch "$MODEL"; fi
VOLUME /data
HEALTHCHECK --interval=60s --timeout=30s --start-period=10s CMD ["mechscope", "doctor"]
ENTRYPOINT ["mechscope"]
CMD ["serve"]
