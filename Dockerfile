# Three images: `full` for the submitter and every KFP task; `ray`, the same without what talks with Kubeflow, for Ray's
# head and workers; and `slim`, without torch and CUDA, for what computes nothing: launchers of RayJobs, Finish, the
# janitor and the MLflow server. `full` is `ray` and one small layer.
#
# Their layers, from the one that changes least: the base image, Debian's packages, the Python dependencies (gigabytes),
# and the project itself (megabytes). A change of code builds, pushes and pulls the last one only.
#
# Every file of a package is compared with its hash in constraints.txt. torch comes from pip's own index, whose Linux
# builds carry CUDA and run on a CPU too. For the CPU build, or another CUDA or ROCm release, name PyTorch's index of
# that build, whose files have no hash here:
#     make image TORCH_INDEX_URL=...
# No index is written down here, so that a mirror serves as well: give PIP_INDEX_URL in the same way.
#
# /usr/local/share/doc/ncsn of each image has sbom.json (CycloneDX) and licenses.csv of its Python packages; Debian's are in
# /var/lib/dpkg/status and /usr/share/doc.

# By an exact tag here, for builders that have only a copy of it; `make image` names it by its digest.
ARG BASE_IMAGE=python:3.11.16-slim-bookworm

# What to install. Stages that copy these files are built again only when their content changes.
FROM ${BASE_IMAGE} AS requirements
WORKDIR /wanted
COPY pyproject.toml constraints.txt ./
RUN sed --in-place '/^\[project.scripts\]/,$d' pyproject.toml

# Separate stages, so that the history of the images has no index address.
FROM ${BASE_IMAGE} AS tools
ARG PIP_INDEX_URL
ENV PATH=/tools/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    UV_BREAK_SYSTEM_PACKAGES=1 \
    UV_BUILD_CONSTRAINT=/wanted/constraints.txt \
    UV_COMPILE_BYTECODE=1 \
    UV_CONSTRAINT=/wanted/constraints.txt \
    UV_DEFAULT_INDEX=${PIP_INDEX_URL} \
    UV_HTTP_TIMEOUT=300 \
    UV_NO_CACHE=1 \
    UV_PREVIEW_FEATURES=build-dependency-hashes \
    UV_PYTHON=/usr/local/bin/python \
    UV_REQUIRE_HASHES=1
WORKDIR /wanted
COPY --from=requirements /wanted ./
RUN python -m venv /tools \
    && sed -n '/^uv==/,/[^\\]$/p' constraints.txt > /tools/uv.txt \
    && pip install --require-hashes --requirement /tools/uv.txt \
    && grep -oE '^(cyclonedx-bom|pip-licenses)==[^ ]+' constraints.txt > /tools/others.txt \
    && uv pip install --python /tools/bin/python --requirement /tools/others.txt
COPY scripts/describe_packages.sh /tools/bin/

FROM tools AS slim-dependencies
RUN printf 'torch\ntorchvision\n' > /tools/without.txt \
    && uv pip install --require-build-hashes --requirement pyproject.toml --excludes /tools/without.txt \
        --extra kubeflow --extra search --extra server \
    && bash /tools/bin/describe_packages.sh

FROM tools AS dependencies
ARG TORCH_INDEX_URL
# Another index's torch has no hash here; what has one is compared all the same.
RUN if [ -n "${TORCH_INDEX_URL:-}" ]; then \
        UV_CONSTRAINT= UV_REQUIRE_HASHES=0 uv pip install --no-deps --default-index "${TORCH_INDEX_URL}" \
            $(grep -oE '^torch(vision)?==[^ ]+' constraints.txt); \
    fi \
    && ${TORCH_INDEX_URL:+env UV_REQUIRE_HASHES=0} uv pip install --require-build-hashes --requirement pyproject.toml \
        --extra search --extra serve --extra inception \
    && bash /tools/bin/describe_packages.sh

# Only what it has more than that one.
FROM dependencies AS full-dependencies
ARG TORCH_INDEX_URL
RUN touch /before \
    && ${TORCH_INDEX_URL:+env UV_REQUIRE_HASHES=0} uv pip install --require-build-hashes --requirement pyproject.toml \
        --extra kubeflow --extra search --extra serve --extra server --extra inception \
    && bash /tools/bin/describe_packages.sh \
    && mkdir /more \
    && find /usr/local -newer /before ! -type d -print0 | tar --create --null --files-from - \
        | tar --extract --directory /more

FROM tools AS project
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY ncsn ncsn
COPY components components
COPY pipelines pipelines
RUN UV_REQUIRE_HASHES=0 uv pip install --require-build-hashes --no-deps --prefix /project/usr/local .

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

FROM base AS computing
# KubeRay's probes call wget, and compute.compile needs a compiler where the network is trained.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ wget \
    && apt-get clean \
    && rm -rf /var/lib/apt/lists/*
COPY --from=dependencies /usr/local /usr/local
COPY configs configs

FROM computing AS ray
COPY --from=project /project /
USER 1000
ARG REVISION=unknown
ENV NCSN_COMMIT=${REVISION}
LABEL org.opencontainers.image.revision="${REVISION}"

FROM computing AS full
COPY --from=full-dependencies /more /
# The reviewed template of the RayJobs that a step of this image starts.
COPY infra/base/kuberay/rayjob.yaml /etc/ncsn/rayjob.yaml
COPY --from=project /project /
USER 1000
ARG REVISION=unknown
ENV NCSN_COMMIT=${REVISION}
LABEL org.opencontainers.image.revision="${REVISION}"
