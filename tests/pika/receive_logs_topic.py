"""A receiver as a reader of RabbitMQ's tutorial five would write it: the arguments are binding keys."""

import os
import sys

import pika

connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()
channel.exchange_declare(exchange="topic_logs", exchange_type="topic")
queue = channel.queue_declare(queue="", exclusive=True).method.queue
for key in sys.argv[1:]:
    channel.queue_bind(exchange="topic_logs", queue=queue, routing_key=key)


def on_message(_channel, method, _properties, body):
    print(f" [x] {method.routing_key}:{body.decode()}", flush=True)


channel.basic_consume(queue=queue, on_message_callback=on_message, auto_ack=True)
print(" [*] Waiting for logs. To exit press CTRL+C", flush=True)
channel.start_consuming()
