"""A receiver as a reader of RabbitMQ's publish/subscribe tutorial would write it."""

import os

import pika

connection = pika.BlockingConnection(pika.URLParameters(os.environ["AMQP_URL"]))
channel = connection.channel()
channel.exchange_declare(exchange="logs", exchange_type="fanout")
queue = channel.queue_declare(queue="", exclusive=True).method.queue
channel.queue_bind(exchange="logs", queue=queue)


def on_message(_channel, _method, _properties, body):
    print(f" [x] {body}", flush=True)


channel.basic_consume(queue=queue, on_message_callback=on_message, auto_ack=True)
print(" [*] Waiting for logs. To exit press CTRL+C", flush=True)
channel.start_consuming()
