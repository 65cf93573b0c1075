from maxconv.cli import script

script()
