"""The programs of RabbitMQ's publish/subscribe tutorial for lines: pika_lines.py publish | consume [-n COUNT]."""

import os
import sys

import pika

connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()
channel.exchange_declare(exchange="logs", exchange_type="fanout")

if sys.argv[1] == "publish":
    for line in sys.stdin.buffer:
        channel.basic_publish(exchange="logs", routing_key="", body=line[:-1])
    connection.close()
else:
    missing = int(sys.argv[3]) if len(sys.argv) > 3 else -1
    queue = channel.queue_declare(queue="", exclusive=True).method.queue
    channel.queue_bind(exchange="logs", queue=queue)

    def on_message(_channel, _method, _properties, body):
        """Writes the body as a line without a buffer, as the program of the tutorial does."""
        global missing
        sys.stdout.buffer.write(body + b"\n")
        sys.stdout.buffer.flush()
        missing -= 1
        if missing == 0:
            channel.stop_consuming()

    channel.basic_consume(queue=queue, on_message_callback=on_message, auto_ack=True)
    print(" [*] Waiting for logs", file=sys.stderr, flush=True)
    channel.start_consuming()
