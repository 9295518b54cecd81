"""What runs the ops: `problem` says what is asked and what a kernel is, `registry` chooses one, and each
other module is one kernel."""
