"""Three small teachers with real skills, trained from labelled images only: `python -m kpu_fast.zoo --help`."""
