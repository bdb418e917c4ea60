"""Watch: the changes of tasks, from the topics to whoever watches."""
