"""The command that trains from a converted checkpoint in MaxText."""

from maxconv.config.tables import defaults
from maxconv.jobs.prepare import Job
from maxconv.targets import place
from maxconv.targets.repository import is_repository, repository_name
from maxconv.text import argument

PROGRAM = "python -m maxtext.trainers.pre_train.train"


def training_command(job: Job) -> str | None:
    """The command, with every argument that the checkpoint needs; None for an adapter alone.

    Those of the run are left to the user: data, steps, where to write.
    """
    if job.training is None:
        return None
    parallelism = {k: n for k, n in job.config.parallelism.items() if n != defaults()[k]}
    told = [
        argument(key, value) for key, value in {**job.training.arguments, **parallelism}.items()
    ]
    directory = job.config.base_output_directory
    key = "load_full_state_path" if job.config.train_state else "load_parameters_path"
    if not is_repository(directory):
        return " ".join([PROGRAM, *told, argument(key, job.items)])
    download = f"hf download {repository_name(directory)} --local-dir DIR"
    loaded = f'{key}="$PWD"/{place.items("DIR")}'
    return " ".join([f"{download} &&", PROGRAM, *told, loaded])
