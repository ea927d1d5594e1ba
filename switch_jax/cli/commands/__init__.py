"""One module per verb: its help, its arguments (`add_arguments`) and its work (`run`)."""
