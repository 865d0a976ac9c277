# Two stages: build the wheel and its environment, then run it as nobody in particular. Not built in CI.
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY requirements/training.lock requirements/
RUN python -m venv /opt/tsugi && /opt/tsugi/bin/pip install --no-cache-dir --require-hashes -r requirements/training.lock
COPY . .
RUN python -m venv /opt/wheel && /opt/wheel/bin/pip install --no-cache-dir build \
 && /opt/wheel/bin/python -m build --wheel --outdir /tmp/wheel \
 && /opt/tsugi/bin/pip install --no-cache-dir --no-deps /tmp/wheel/*.whl

FROM python:3.11-slim-bookworm
RUN useradd --system --uid 10001 --create-home tsugi && mkdir /data && chown tsugi /data
COPY --from=build --chown=tsugi /opt/tsugi /opt/tsugi
USER tsugi
# onnxruntime would otherwise write usage files into the home folder.
ENV PATH=/opt/tsugi/bin:$PATH TSUGI_DATA_DIR=/data ORT_DISABLE_TELEMETRY=1
# Kernels are compiled here, once, for the kind of processor the image is built on; another kind compiles at its start.
RUN python -m server.decisioning.warm
VOLUME /data
EXPOSE 7410 7411
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s CMD ["python", "-m", "server", "health"]
ENTRYPOINT ["tsugi"]
CMD ["serve"]
