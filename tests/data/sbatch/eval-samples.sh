#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=1
#SBATCH --error=/home/me/scratch/jobs/RUN/batch.log
#SBATCH --job-name=eval-digits
#SBATCH --mem=8GB
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/home/me/scratch/jobs/RUN/batch.log
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=60

# setup
# the code as it was at submission, then the folder of submission, for teachers of your own
export PYTHONSAFEPATH=1 PYTHONPATH=/home/me/scratch/jobs/RUN/code:/home/me${PYTHONPATH:+:$PYTHONPATH}
attempt=${SLURM_RESTART_COUNT:-0}
# for what was downloaded at submission, as a container may have another home
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-/home/me/.cache}
trap : TERM  # the signal is for the tasks; this script waits for them
export SUBMITIT_LOG_LEVEL=${SUBMITIT_LOG_LEVEL:-ERROR}
# the token with which Ray's processes authenticate; new for each attempt, printed nowhere
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
/venv/bin/python -m dsno_cluster.cluster.attempt begin /home/me/scratch/jobs/RUN || exit $?

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --export=ALL --cpus-per-task=1 --output=/home/me/scratch/jobs/RUN/attempts/$attempt/task-%t.log --kill-on-bad-exit=0 --container-image=team/dsno --container-mounts=/home/me:/home/me,/scratch/samples:/scratch/samples --container-workdir=/home/me python3 -u -m submitit.core._submit /home/me/scratch/jobs/RUN/submitit


# teardown
/venv/bin/python -m dsno_cluster.cluster.attempt end /home/me/scratch/jobs/RUN $?