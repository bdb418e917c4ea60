"""Watch: reads the changes of tasks from the event topics and streams them to watchers."""
