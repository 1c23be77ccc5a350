"""A receiver as a reader of RabbitMQ's tutorials four and five would write it.

The arguments are the type of the exchange (direct or topic), and the binding keys.
"""

import os
import sys

import pika

connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()
kind, keys = sys.argv[1], sys.argv[2:]
exchange = f"{kind}_logs"
channel.exchange_declare(exchange=exchange, exchange_type=kind)
queue = channel.queue_declare(queue="", exclusive=True).method.queue
for key in keys:
    channel.queue_bind(exchange=exchange, queue=queue, routing_key=key)


def on_message(_channel, method, _properties, body):
    print(f" [x] {method.routing_key}:{body.decode()}", flush=True)


channel.basic_consume(queue=queue, on_message_callback=on_message, auto_ack=True)
print(" [*] Waiting for logs. To exit press CTRL+C", flush=True)
channel.start_consuming()
