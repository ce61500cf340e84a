# Two images. Build them in the repository's root:
#
#     docker build -t prodisco/sandbox-server:latest .
#     docker build -t prodisco/mcp-server:latest --target mcp-server .
#
# sandbox-server is the reference sandbox server: docs/server.md says how to run it and how to add
# packages of your own. mcp-server is the MCP program: deploy/overlays/mcp-server runs it.
# Both run as an ordinary user, without capabilities and on a read-only root file system.

ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS base
# The official image has no bytecode of the standard library, which would be compiled anew for
# every start and every execution.
RUN python -m compileall -q -x '/(test|tests|idlelib|lib2to3|site-packages|dist-packages)/' \
        "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
# A number, so that Kubernetes can verify runAsNonRoot.
RUN groupadd --gid 65532 sandbox \
    && useradd --uid 65532 --gid 65532 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin sandbox \
    && install -d -o 65532 -g 65532 -m 0700 /tmp/prodisco-scripts

FROM base AS source
# Git's data, which have the version, are not copied: a release gives its own.
ARG VERSION=0.1.0
ENV SETUPTOOLS_SCM_PRETEND_VERSION=${VERSION}
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src ./src

FROM source AS mcp-build
RUN python -m venv /opt/mcp \
    && /opt/mcp/bin/pip install --no-cache-dir --no-compile ".[mcp,prometheus]" \
    && python -m compileall -q /opt/mcp

FROM base AS mcp-server
COPY --from=mcp-build /opt/mcp /opt/mcp
USER 65532:65532
ENV PATH=/opt/mcp/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["prodisco-sandbox-mcp"]

FROM source AS build
# The server needs gRPC alone, not what the manager needs.
RUN python -m venv /opt/sandbox \
    && /opt/sandbox/bin/pip install --no-cache-dir --no-compile \
        "grpcio>=1.74.0" "grpcio-health-checking>=1.74.0" "grpcio-reflection>=1.74.0" "protobuf>=6.31.1" pytest \
    && /opt/sandbox/bin/pip install --no-cache-dir --no-compile --no-deps . \
    && /opt/sandbox/bin/python -m compileall -q /opt/sandbox

# The last one is built where no --target is given.
FROM base AS sandbox-server
COPY --from=build /opt/sandbox /opt/sandbox
USER 65532:65532

# In a container, what executions write there is bounded by the container's own limits.
ENV PATH=/opt/sandbox/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    SANDBOX_USE_TCP=true \
    SANDBOX_TCP_HOST=0.0.0.0 \
    SANDBOX_TCP_PORT=50051 \
    SANDBOX_WRITABLE=/tmp \
    SCRIPTS_CACHE_DIR=/tmp/prodisco-scripts
WORKDIR /tmp
EXPOSE 50051
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=5s CMD ["python", "-m", "prodisco_sandbox.server", "--check"]
ENTRYPOINT ["python", "-m", "prodisco_sandbox.server"]
