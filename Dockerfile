# syntax=docker/dockerfile:1
# instructrec in a container, for the accelerator that VARIANT names: tpu, cuda or cpu.
#
#   docker build --build-arg VARIANT=tpu --tag instructrec:tpu .
#   docker run --rm instructrec:tpu doctor
#
# On a TPU VM the container needs the chips and the host's network: docker run --privileged --net=host ...
# With NVIDIA's container toolkit it needs the GPUs: docker run --gpus all ... (CUDA comes with the wheels, the driver from the host).

FROM python:3.12-slim AS build
RUN pip install --no-cache-dir "uv>=0.9"
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY instructrec_jax ./instructrec_jax
RUN uv build --wheel --out-dir /wheels
ARG VARIANT=cpu
# One environment in a folder that the last stage takes over: no compiler and no cache stay in the image.
RUN case "$VARIANT" in \
      tpu) extras=tpu,gcs ;; \
      cuda) extras=cuda,gcs ;; \
      cpu) extras=gcs ;; \
      *) echo "VARIANT is $VARIANT, and must be tpu, cuda or cpu" >&2; exit 2 ;; \
    esac \
    && uv venv /opt/instructrec \
    && uv pip install --no-cache --python /opt/instructrec/bin/python "$(echo /wheels/*.whl)[$extras]"

FROM python:3.12-slim
ARG VARIANT=cpu
LABEL org.opencontainers.image.title="instructrec_jax ($VARIANT)" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --create-home --uid 1000 instructrec
COPY --from=build /opt/instructrec /opt/instructrec
ENV PATH=/opt/instructrec/bin:$PATH
WORKDIR /app
COPY --chown=instructrec configs ./configs
RUN chown instructrec /app
USER 1000
ENTRYPOINT ["instructrec"]
