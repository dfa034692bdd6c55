# The gateway, and the simulated pod: `docker build -t gateway-extproc .`, then
#   docker run gateway-extproc serve --config FILE
#   docker run gateway-extproc pod
# Everything is a pinned wheel whose hash is checked; tools and build stay in the first stage.
ARG PYTHON=python:3.13-slim-trixie

FROM ${PYTHON} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY requirements/ requirements/
RUN pip install --require-hashes --only-binary :all: -c requirements/demo.txt -r requirements/build.in \
    && python -m venv --without-pip /opt/gateway \
    && pip --python /opt/gateway/bin/python install --no-deps --require-hashes --only-binary :all: \
        -r requirements/runtime.txt
COPY pyproject.toml README.md LICENSE ./
COPY gateway_extproc/ gateway_extproc/
RUN pip wheel --no-deps --no-build-isolation --no-index --wheel-dir /dist . \
    && pip --python /opt/gateway/bin/python install --no-deps --no-index /dist/*.whl

FROM ${PYTHON}
LABEL org.opencontainers.image.title="gateway-extproc" org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/gateway /opt/gateway
ENV PATH=/opt/gateway/bin:$PATH PYTHONDONTWRITEBYTECODE=1
# By number, so that Kubernetes can see that it is not root.
USER 65532:65532
ENTRYPOINT ["gateway-extproc"]
CMD ["--help"]
