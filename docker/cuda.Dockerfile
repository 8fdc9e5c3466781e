# Fleetcast for NVIDIA GPUs. Built from the repository's root:
#   docker build -f docker/cuda.Dockerfile -t fleetcast:0.1.0-cuda .
# docker/requirements-cuda.lock names every package with its hash (`make lock`). The CUDA libraries come with the wheels of
# torch and onnxruntime-gpu; the host needs the NVIDIA driver 580 or newer (torch is built for CUDA 13) and the NVIDIA
# container toolkit. A worker that finds an older one, or no GPU, says so in one sentence and the server ends.
# Run: docker run --gpus all -p 127.0.0.1:8080:8080 -e FLEETCAST_STORE=s3://bucket/prefix fleetcast:0.1.0-cuda serve

FROM python:3.11.16-slim-bookworm@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84 AS dependencies
WORKDIR /src
COPY docker/requirements-cuda.lock docker/
RUN python -m venv /opt/fleetcast && \
    /opt/fleetcast/bin/pip install --no-cache-dir --only-binary :all: --require-hashes \
      -r docker/requirements-cuda.lock

FROM dependencies AS program
# For handlers/codecs/_quick_numbers.c; the image that is shipped has no compiler.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY handlers handlers
COPY model_store model_store
COPY loadtest loadtest
RUN /opt/fleetcast/bin/pip install --no-cache-dir --ignore-installed --prefix /opt/program --no-index --no-deps --no-build-isolation .

FROM python:3.11.16-slim-bookworm@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/fleetcast fleetcast && \
    install -d -o fleetcast /var/lib/fleetcast/cache /var/lib/fleetcast/access
# What the program needs is a layer of its own, which a new version of the program does not send again.
COPY --from=dependencies /opt/fleetcast /opt/fleetcast
COPY --from=program /opt/program /opt/fleetcast
USER 10001
WORKDIR /var/lib/fleetcast
# The inference listener must be reachable from outside the container; `docker run -p` decides what is published. The
# management and metrics listeners stay on the container's loopback until FLEETCAST_MANAGEMENT_HOST and
# FLEETCAST_METRICS_HOST name an address and FLEETCAST_TOKENS a file (see docker/compose.yaml).
# NVIDIA_REQUIRE_CUDA: the container toolkit refuses to start the container on a host whose driver is too old.
LABEL org.fleetcast.nvidia-driver=">=580"
ENV PATH=/opt/fleetcast/bin:$PATH \
    NVIDIA_REQUIRE_CUDA="cuda>=13.0" \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    FLEETCAST_HOST=0.0.0.0 \
    FLEETCAST_DISK_CACHE=/var/lib/fleetcast/cache
VOLUME /var/lib/fleetcast/cache
EXPOSE 8080 8081 8082
# What SageMaker asks of the container: docs/sagemaker-container.md.
LABEL com.amazonaws.sagemaker.capabilities.multi-models=true \
      com.amazonaws.sagemaker.capabilities.accept-bind-to-port=true
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/ready', timeout=2)"]
ENTRYPOINT ["fleetcast"]
CMD ["serve"]
