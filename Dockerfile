# One image for all of Baton's parts: `docker run baton router …`, `… prefill …`, `… decode …`, `… up`.
#
#   docker build -t baton:0.1.0 .
#   docker build -t baton:0.1.0 --build-arg TORCH="torch==2.13.0 --index-url …" .   # another build of torch

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH="torch==2.13.0"
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/baton
ENV PATH=/opt/baton/bin:$PATH
WORKDIR /src
# Compiles the CPU's attention kernel; it stays behind in this stage.
RUN apt-get update && \
    apt-get install --yes --no-install-recommends gcc libc6-dev && \
    rm -rf /var/lib/apt/lists/*
# What changes seldom comes first: torch, then what the parts depend on, then Baton itself.
COPY constraints.txt ./
RUN pip install ${TORCH} --constraint constraints.txt && \
    pip install setuptools --constraint constraints.txt
COPY pyproject.toml README.md ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = project['optional-dependencies']; \
print(*project['dependencies'], *extras['router'], *extras['worker'], *extras['client'], sep='\n')" > needs.txt && \
    pip install --requirement needs.txt --constraint constraints.txt
COPY baton/ baton/
COPY engine/ engine/
COPY kvtransfer/ kvtransfer/
COPY discovery/ discovery/
COPY worker/ worker/
COPY prefill_worker/ prefill_worker/
COPY decode_worker/ decode_worker/
COPY router/ router/
COPY demo_model/ demo_model/
COPY bench/ bench/
COPY sim/ sim/
RUN pip install --no-build-isolation --no-deps . && \
    pip check && \
    python -I -m engine.kernels.cpu.build && \
    baton --version && \
    python -I -c "from baton.model_in_the_box import DIRECTORY; open(DIRECTORY / 'config.json')"

FROM python:${PYTHON}-slim
RUN groupadd --gid 10001 baton && \
    useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin baton
COPY --from=build /opt/baton /opt/baton
ENV PATH=/opt/baton/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
WORKDIR /home/baton
USER 10001:10001
# gRPC, the router's HTTP, a worker's metrics. Health is grpc.health.v1's business: see the probes in k8s/base.
EXPOSE 50051 8000 9090
# Drains: open requests end, no new ones are taken.
STOPSIGNAL SIGTERM
ENTRYPOINT ["baton"]
CMD ["--help"]
