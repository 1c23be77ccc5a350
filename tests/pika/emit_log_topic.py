"""A publisher as a reader of RabbitMQ's tutorial five would write it: the first argument is the routing key such as kern.critical."""

import os
import sys

import pika

connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()
channel.exchange_declare(exchange="topic_logs", exchange_type="topic")

key, message = sys.argv[1], " ".join(sys.argv[2:])
channel.basic_publish(exchange="topic_logs", routing_key=key, body=message)
print(f" [x] Sent {key}:{message}")
connection.close()
