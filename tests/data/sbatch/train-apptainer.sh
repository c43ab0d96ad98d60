#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=1
#SBATCH --error=/home/me/scratch/jobs/RUN/batch.log
#SBATCH --gpus-per-node=4
#SBATCH --job-name=train-digits
#SBATCH --mem=100GB
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/home/me/scratch/jobs/RUN/batch.log
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=90

# setup
# the code as it was at submission, then the folder of submission, for teachers of your own
export PYTHONSAFEPATH=1 PYTHONPATH=/home/me/scratch/jobs/RUN/code:/home/me${PYTHONPATH:+:$PYTHONPATH}
attempt=${SLURM_RESTART_COUNT:-0}
# for what was downloaded at submission, as a container may have another home
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-/home/me/.cache}
trap : TERM  # the signal is for the tasks; this script waits for them
export SUBMITIT_LOG_LEVEL=${SUBMITIT_LOG_LEVEL:-ERROR}
/venv/bin/python -m dsno_cluster.cluster.attempt begin /home/me/scratch/jobs/RUN || exit $?

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --export=ALL --cpus-per-task=1 --output=/home/me/scratch/jobs/RUN/attempts/$attempt/task-%t.log --kill-on-bad-exit=1 apptainer exec --nv --bind /home/me,/data --pwd /home/me '/home/me/my images/dsno.sif' /opt/venv/bin/python -u -m submitit.core._submit /home/me/scratch/jobs/RUN/submitit


# teardown
/venv/bin/python -m dsno_cluster.cluster.attempt end /home/me/scratch/jobs/RUN $?