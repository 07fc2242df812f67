# GPU image; the same image serves on CPU with `--device cpu`, where g++ compiles the model's blocks.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 10001 euryale \
    && mkdir /cache \
    && chown euryale:euryale /cache
ENV VIRTUAL_ENV=/opt/euryale \
    PATH=/opt/euryale/bin:$PATH \
    EURYALE_CACHE=/cache/euryale \
    HF_HOME=/cache/huggingface \
    PYTHONUNBUFFERED=1

# Dependencies change less often than the source, so they get a layer of their own.
WORKDIR /src
RUN python3 -m venv $VIRTUAL_ENV && pip install --no-cache-dir 'torch>=2.11'
COPY pyproject.toml README.md LICENSE ./
COPY heads heads
COPY server server
COPY euryale euryale
COPY training training
COPY bench bench
RUN pip install --no-cache-dir .

USER euryale
WORKDIR /home/euryale
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["euryale"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
