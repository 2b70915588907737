# Two images: `full` for the submitter, the Ray head and workers, and every KFP task; and `slim`, without torch and CUDA,
# for what computes nothing: launchers of RayJobs, Finish, the janitor and the MLflow server.
#
# Their layers, from the one that changes least: the base image, Debian's packages, the Python dependencies (gigabytes),
# and the project itself (megabytes). A change of code builds, pushes and pulls the last one only.
#
# torch comes from pip's own index, whose Linux builds carry CUDA and run on a CPU too. For the CPU build, or another
# CUDA or ROCm release, name PyTorch's index of that build:
#     make image TORCH_INDEX_URL=...
# No index is written down here, so that a mirror serves as well: give PIP_INDEX_URL in the same way.

# By an exact tag here, for builders that have only a copy of it; `make image` names it by its digest.
ARG BASE_IMAGE=python:3.11.16-slim-bookworm

# What to install. Stages that copy these files are built again only when their content changes.
FROM ${BASE_IMAGE} AS requirements
COPY pyproject.toml ./
# torch-fidelity is for evaluation.extractor: inception.
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = p['optional-dependencies']; light = [*p['dependencies'], *extras['server']]; \
    print(*light, *extras['serve'], 'torch-fidelity', sep='\n', file=open('/full.txt', 'w')); \
    print(*(each for each in light if not each.startswith('torch')), sep='\n', file=open('/slim.txt', 'w'))"

# Separate stages, so that the history of the images has no index address.
FROM ${BASE_IMAGE} AS slim-dependencies
ARG PIP_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
COPY constraints.txt /
COPY --from=requirements /slim.txt /
# Without the packages' own tests and static libraries, which nothing imports or links.
RUN pip install --constraint /constraints.txt --requirement /slim.txt \
    && find /usr/local -depth \( -type d -name tests -o -name '*.a' \) -exec rm -rf {} +

FROM slim-dependencies AS dependencies
ARG PIP_INDEX_URL
ARG TORCH_INDEX_URL
COPY --from=requirements /full.txt /
RUN if [ -n "${TORCH_INDEX_URL:-}" ]; then \
        pip install --no-deps --index-url "${TORCH_INDEX_URL}" --constraint /constraints.txt torch torchvision; \
    fi \
    && pip install --constraint /constraints.txt --requirement /full.txt \
    && find /usr/local -depth \( -type d -name tests -o -name '*.a' \) -exec rm -rf {} +

FROM ${BASE_IMAGE} AS project
ARG PIP_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY ncsn ncsn
COPY components components
COPY pipelines pipelines
RUN pip install --no-deps --root /project .

FROM ${BASE_IMAGE} AS base
RUN useradd --uid 1000 --create-home ncsn \
    && install --directory --owner=1000 --group=1000 /var/cache/ncsn
# Ray here spans nodes, so its switch for loopback-only clusters stays unset.
ENV PYTHONUNBUFFERED=1 \
    NCSN_CACHE_DIR=/var/cache/ncsn \
    NCSN_RAYJOB_TEMPLATE=/etc/ncsn/rayjob.yaml \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true \
    GOMP_SPINCOUNT=2000 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="ncsn" \
      org.opencontainers.image.description="Noise conditional score networks as a Kubeflow, Ray and MLflow pipeline" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
WORKDIR /home/ncsn
ENTRYPOINT ["ncsn"]
CMD ["--help"]

FROM base AS slim
# Into the base image's own Python, so that a login shell, which resets PATH, finds the same ncsn.
COPY --from=slim-dependencies /usr/local /usr/local
COPY configs configs
# The reviewed template of the RayJobs that a step of this image starts.
COPY infra/base/kuberay/rayjob.yaml /etc/ncsn/rayjob.yaml
COPY --from=project /project /
# A number, because Kubernetes cannot check runAsNonRoot against a name.
USER 1000
ARG REVISION=unknown
ENV NCSN_COMMIT=${REVISION}
LABEL org.opencontainers.image.revision="${REVISION}"

FROM base AS full
# KubeRay's probes call wget, and compute.compile needs a compiler where the network is trained.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ wget \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/*
COPY --from=dependencies /usr/local /usr/local
COPY configs configs
# The reviewed template of the RayJobs that a step of this image starts.
COPY infra/base/kuberay/rayjob.yaml /etc/ncsn/rayjob.yaml
COPY --from=project /project /
USER 1000
ARG REVISION=unknown
ENV NCSN_COMMIT=${REVISION}
LABEL org.opencontainers.image.revision="${REVISION}"
