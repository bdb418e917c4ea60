"""The operations behind `postroad lag`, `dead`, `replay` and `rebuild`, for any user interface.

Nothing here prints, asks a question or ends the process. `errors` lists what an operation raises on top of
`confluent_kafka.KafkaException` and `sqlalchemy.exc.DBAPIError`.
"""
