# docker build -t kpu_fast . && docker run --gpus all --ipc=host -v /data:/data -v $PWD/runs:/opt/kpu_fast/runs \
#     -v $HOME/.cache:/root/.cache kpu_fast \
#     deepspeed kpu_fast/train.py --config configs/h100.json --set 'source=/data/train-*.tar'
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends git ninja-build pdsh python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN python3 -m venv $VIRTUAL_ENV

WORKDIR /opt/kpu_fast
COPY . .
RUN pip install --no-cache-dir -c constraints.txt -e '.[train,dev]'
CMD ["python", "kpu_fast/train.py", "--config", "configs/random.json"]
