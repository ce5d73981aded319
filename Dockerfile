# syntax=docker/dockerfile:1
# One image for the API, the workers and the migration; the command says which.
#
#   docker build -t headwater .                            for the CPU
#   docker build -t headwater:gpu --build-arg DEVICE=gpu . FAISS for a GPU, on a CUDA base
#
# The package index is pip's: PIP_INDEX_URL and PIP_EXTRA_INDEX_URL are build arguments. An index that has torch built
# for the CPU alone makes the CPU image several gigabytes smaller.
ARG DEVICE=cpu

FROM python:3.12-slim-bookworm AS base-cpu

# torch and FAISS bring their CUDA libraries as wheels: of CUDA itself the smallest image is enough
FROM nvidia/cuda:12.8.1-base-ubuntu24.04 AS base-gpu
ENV HEADWATER_DEVICE=cuda
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3006
FROM base-${DEVICE} AS build
ARG DEVICE
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv /opt/headwater
# the dependencies first: a change of the code alone leaves this layer as it is
COPY pyproject.toml constraints.txt ./
RUN python3 -c "import sys, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; e = p['optional-dependencies']; print(*p['dependencies'], *e[sys.argv[1]], *e['otel'], sep='\n')" "$DEVICE" > requirements.txt \
 && /opt/headwater/bin/pip install --constraint constraints.txt --requirement requirements.txt
COPY README.md LICENSE ./
COPY migrations ./migrations
COPY workers ./workers
COPY sdk ./sdk
COPY app ./app
RUN /opt/headwater/bin/pip install --no-deps .

# hadolint ignore=DL3006
FROM base-${DEVICE}
RUN useradd --system --uid 10001 --create-home headwater \
 && install --directory --owner headwater --group headwater /data /models
COPY --from=build /opt/headwater /opt/headwater
# hadolint ignore=DL3064
ENV PATH=/opt/headwater/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    TOKENIZERS_PARALLELISM=false \
    HEADWATER_HOST=0.0.0.0 \
    HEADWATER_PORT=8000 \
    HEADWATER_DATA_DIR=/data \
    HEADWATER_ALLOWED_ROOTS='["/data", "/models"]'
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['HEADWATER_PORT']}/healthz\", timeout=4)"]
ENTRYPOINT ["headwater"]
CMD ["serve"]
