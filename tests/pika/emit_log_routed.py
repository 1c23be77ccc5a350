"""A publisher as a reader of RabbitMQ's tutorials four and five would write it.

The arguments are the type of the exchange (direct or topic), the routing key, and the words of the message.
"""

import os
import sys

import pika

connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()
kind, key, message = sys.argv[1], sys.argv[2], " ".join(sys.argv[3:])
exchange = f"{kind}_logs"
channel.exchange_declare(exchange=exchange, exchange_type=kind)

channel.basic_publish(exchange=exchange, routing_key=key, body=message)
print(f" [x] Sent {key}:{message}")
connection.close()
