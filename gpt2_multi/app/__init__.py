"""The programs: the command line, the pipeline, the check of a machine."""
