# One image for the submitter, the Ray head and workers, and every KFP task.
#
# torch comes from pip's own index, whose Linux builds carry CUDA and run on a CPU too. For a smaller image, or another
# CUDA or ROCm release, name the index of that build of PyTorch:
#     docker build --build-arg TORCH_INDEX_URL=... .
# No index is written down here, so that a mirror serves as well: give PIP_INDEX_URL in the same way.

ARG BASE_IMAGE=python:3.11.13-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG PIP_INDEX_URL
ARG TORCH_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# The dependencies, in layers of their own: they are gigabytes and change seldom.
COPY constraints.txt pyproject.toml ./
RUN if [ -n "${TORCH_INDEX_URL:-}" ]; then \
        pip install --no-deps --index-url "${TORCH_INDEX_URL}" 'torch>=2.6,<3' 'torchvision>=0.21'; \
    fi
# torch-fidelity is for evaluation.extractor: inception.
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        print(*p['dependencies'], *p['optional-dependencies']['server'], 'torch-fidelity', sep='\n')" > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt
COPY README.md LICENSE ./
COPY ncsn ncsn
COPY components components
COPY pipelines pipelines
RUN pip install --no-deps .

FROM ${BASE_IMAGE}
ARG REVISION=unknown
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="ncsn" \
      org.opencontainers.image.description="Noise conditional score networks as a Kubeflow, Ray and MLflow pipeline" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# KubeRay's probes call wget.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home ncsn \
    && install --directory --owner=1000 --group=1000 /var/cache/ncsn
# Into the base image's own Python, so that a login shell, which resets PATH, finds the same ray and ncsn.
COPY --from=build /usr/local /usr/local
# Ray here spans nodes, so its switch for loopback-only clusters stays unset.
ENV PYTHONUNBUFFERED=1 \
    NCSN_COMMIT=${REVISION} \
    NCSN_CACHE_DIR=/var/cache/ncsn \
    NCSN_RAYJOB_TEMPLATE=/etc/ncsn/rayjob.yaml \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true \
    GOMP_SPINCOUNT=2000 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# A number, because Kubernetes cannot check runAsNonRoot against a name.
USER 1000
WORKDIR /home/ncsn
COPY configs configs
# The reviewed template of the RayJobs that a step of this image starts.
COPY infra/base/kuberay/rayjob.yaml /etc/ncsn/rayjob.yaml
ENTRYPOINT ["ncsn"]
CMD ["--help"]
