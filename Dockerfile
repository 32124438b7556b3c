# docker build -t generalized-attention . && docker run --rm generalized-attention
# For GPUs, add --gpus all to `docker run`. For CPUs alone, --build-arg TORCH_INDEX=... names an index of PyTorch's builds
# without CUDA, which are a tenth as large.
FROM python:3.11-slim

RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home user
USER user
WORKDIR /home/user/project
COPY --chown=user . .
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1
# The versions are those that the tests last ran with.
RUN make .venv/created \
  && .venv/bin/python -m pip install -c constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch torchvision \
  && make .venv/installed
CMD ["make", "quickstart"]
