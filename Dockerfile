# docker build -t megavid .
# docker run --gpus all --ipc host --ulimit memlock=-1 -v $PWD/runs:/workspace/runs megavid train tiny --out runs/tiny
# Not run yet. Ask `megavid doctor` inside, on a machine with GPUs, before the first run.
#
# The image carries torch, Transformer Engine and apex, built together, and pins them through PIP_CONSTRAINT
# (/etc/pip/constraint.txt). Nothing below may move them: what pip would have to change, it refuses.
ARG BASE_IMAGE=nvcr.io/nvidia/pytorch:25.10-py3
FROM ${BASE_IMAGE}

WORKDIR /opt/megavid
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY megavid megavid
COPY csrc csrc

# The image's own versions are written down before and compared after; [gpu] is left out, the image has it.
RUN pip list --format=freeze | grep -iE '^(torch|transformer[-_]engine|apex)(==| @)' | sort > /tmp/before \
 && pip install --no-cache-dir --no-build-isolation '.[inference]' \
 && pip list --format=freeze | grep -iE '^(torch|transformer[-_]engine|apex)(==| @)' | sort > /tmp/after \
 && diff /tmp/before /tmp/after

WORKDIR /workspace
ENTRYPOINT ["megavid"]
CMD ["--help"]
