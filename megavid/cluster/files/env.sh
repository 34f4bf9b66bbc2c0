# Settings of every job here: sourced by the .sbatch files, once, on the first node. srun hands the environment on.
#
# Edit the parts marked EDIT for your cluster; everything else has a default that works, and `megavid doctor` inside a
# job says which of these a GPU run would miss. A variable that is set before sbatch wins over its default here.

# EDIT: the Python environment. The same path must be visible on every node.
# module load cuda/12.8
# source /shared/venvs/megavid/bin/activate
# shellcheck shell=bash disable=SC2034

# EDIT: what the command is called, where it is not on PATH ("python -m megavid").
read -ra MEGAVID <<< "${MEGAVID_COMMAND:-megavid}"

# EDIT: containers. One of the two, or none; mount what holds data, runs and this folder.
SRUN_OPTIONS=()
# pyxis and enroot (srun has --container-image):
# SRUN_OPTIONS+=(--container-image=/shared/images/megavid.sqsh --container-mounts=/shared:/shared --no-container-mount-home)
# apptainer (no plugin in Slurm; --nv brings the driver's libraries in):
# MEGAVID=(apptainer exec --nv --bind /shared /shared/images/megavid.sif megavid)

# A packed Python environment on shared storage, unpacked once on each node before the ranks start; "" for none. Every
# rank that imports from shared storage asks it thousands of times for small files; this way a node reads one large one:
#   python -m compileall -q ENV; tar -C ENV -cf /shared/images/megavid.tar .        (ENV: a venv, megavid not editable)
MEGAVID_STAGE=${MEGAVID_STAGE:-}

# Where the ranks come from: "srun" (one task a GPU; Slurm sees, signals and accounts every rank) or "torchrun" (one task
# a node, which starts the ranks; for sites whose srun cannot start several tasks in one container).
RANKS_BY=${MEGAVID_RANKS_BY:-srun}

# --- Rendezvous -------------------------------------------------------------------------------------------------------
# Rank 0 is on the first node of the allocation; where its name does not resolve from the others, set an address.
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
# From the job's number, so that jobs which share a node differ; below the ports that systems give out by themselves. A
# requeued job takes another one: its former incarnation may still hold the port on a node that Slurm lost sight of.
export MASTER_PORT=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID + 1000 * ${SLURM_RESTART_COUNT:-0}) % 10000))}

# --- Network ----------------------------------------------------------------------------------------------------------
# EDIT where a node has several networks: gloo (rendezvous, checkpoints' small talk) and NCCL's bootstrap must pick one
# that all nodes share. A leading ^ means "any but", = an exact name.
# export GLOO_SOCKET_IFNAME=eth0
# export NCCL_SOCKET_IFNAME=^lo,docker0
# EDIT: which InfiniBand adapters carry the traffic, where some of them are for storage.
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3
# A collective that fails ends its rank instead of hanging it: the watchdog's exit code then decides what happens next.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# Only NCCL's complaints: INFO from a thousand ranks is a gigabyte of log.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# --- CPU, NUMA, GPUs --------------------------------------------------------------------------------------------------
# Threads of one rank: its share of the node's cores. Unset, every rank would start one thread for each core of the node.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# EDIT where the site does not bind by itself: a rank stays on the cores next to its GPU. "cores" where tasks are handed
# out in the order of the GPUs; map_ldom:0,0,0,0,1,1,1,1 names the NUMA domain of each local rank (`nvidia-smi topo -m`).
[ -n "${MEGAVID_CPU_BIND:-}" ] && SRUN_OPTIONS+=(--cpu-bind="$MEGAVID_CPU_BIND")
# Every rank of a node sees all of its GPUs and takes the one of its local rank: NCCL cannot use NVLink between processes
# that do not see each other's GPUs, which is what --gpus-per-task does.
SRUN_OPTIONS+=(--gpu-bind=none)
# srun does not inherit --cpus-per-task from sbatch since Slurm 22.05.
[ -n "${SLURM_CPUS_PER_TASK:-}" ] && export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# Kernels of one GPU start in the order in which they were issued: megatron-core overlaps communication with computation
# by that order (tensor, context and expert parallelism). `megavid launch slurm` writes what the layout needs.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Segments that grow: less memory lost to fragments when packs differ in their number of clips.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

# --- Start-up of many ranks -------------------------------------------------------------------------------------------
# Compiled kernels are kept on the node: a thousand ranks that compile into one shared folder wait for each other's locks,
# and a shared file system answers small files slowly. One folder a user, so that the next job on the node finds them.
NODE_CACHE=${MEGAVID_NODE_CACHE:-${TMPDIR:-/tmp}/megavid-$(id -u)}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$NODE_CACHE/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$NODE_CACHE/inductor}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$NODE_CACHE/extensions}
export CUDA_CACHE_PATH=${CUDA_CACHE_PATH:-$NODE_CACHE/cuda}
# Ranks do not write .pyc files beside the shared sources, all at once, while they import.
export PYTHONDONTWRITEBYTECODE=1
# Lines of the log appear when they are written.
export PYTHONUNBUFFERED=1
