"""Every tuner of the installed PEFT as a method of adapterhub."""
