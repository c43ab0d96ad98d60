#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=64
#SBATCH --error=/home/me/scratch/jobs/RUN/batch.log
#SBATCH --gpus-per-node=8
#SBATCH --job-name=gen-trajectories-digits
#SBATCH --mem=400GB
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/home/me/scratch/jobs/RUN/batch.log
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1440

# setup
# the code as it was at submission, then the folder of submission, for teachers of your own
export PYTHONSAFEPATH=1 PYTHONPATH=/home/me/scratch/jobs/RUN/code:/home/me${PYTHONPATH:+:$PYTHONPATH}
attempt=${SLURM_RESTART_COUNT:-0}
# for what was downloaded at submission, as a container may have another home
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-/scratch/me/.cache}
trap : TERM  # the signal is for the tasks; this script waits for them
export SUBMITIT_LOG_LEVEL=${SUBMITIT_LOG_LEVEL:-ERROR}
# the token with which Ray's processes authenticate; new for each attempt, printed nowhere
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
/venv/bin/python -m dsno_cluster.cluster.attempt begin /home/me/scratch/jobs/RUN || exit $?

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --export=ALL --cpus-per-task=64 --output=/home/me/scratch/jobs/RUN/attempts/$attempt/task-%t.log --kill-on-bad-exit=0 '--container-image=registry.example.org#team/dsno:1' --container-mounts=/home/me:/home/me,/scratch/me/.cache/dsno-cluster:/scratch/me/.cache/dsno-cluster,/data/images:/data/images,/cache:/root/.cache:ro --container-workdir=/home/me --no-container-mount-home python3 -u -m submitit.core._submit /home/me/scratch/jobs/RUN/submitit


# teardown
/venv/bin/python -m dsno_cluster.cluster.attempt end /home/me/scratch/jobs/RUN $?