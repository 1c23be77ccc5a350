/*
 * The reference: a publisher and a consumer on librabbitmq that do only the measured work. Exchange, queue, prefetch
 * and acknowledgements are those of emit-log and receive-logs. AMQP_URL is the broker.
 *
 *   yardstick publish < LINES          publishes each line as soon as it is read, without confirms
 *   yardstick consume [-n COUNT] [-a] [-b] [-s STREAM]
 *                                      writes each body as a line, and flushes when no more input waits;
 *                                      -n: ends after COUNT, -a: automatic acknowledgement, -b: bodies end in a newline
 *                                      -s: from the first message of a stream, not from a queue of its own
 *   yardstick version                  prints the version of librabbitmq
 */
#include <amqp.h>
#include <amqp_tcp_socket.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

enum { PREFETCH = 2000, ACK_EVERY = 1000, FRAME_MAX = 131072, INPUT = 4 << 20, OUTPUT = 256 << 10 };

static amqp_connection_state_t connection;
static const amqp_channel_t channel = 1;

static void check(int ok, const char *operation)
{
    if (ok) return;
    fprintf(stderr, "yardstick: %s\n", operation);
    exit(1);
}

static void answered(const char *operation)
{
    check(amqp_get_rpc_reply(connection).reply_type == AMQP_RESPONSE_NORMAL, operation);
}

static void open_connection(void)
{
    const char *variable = getenv("AMQP_URL");
    check(variable != NULL, "AMQP_URL is not set");
    struct amqp_connection_info to;
    check(amqp_parse_url(strdup(variable), &to) == AMQP_STATUS_OK, "parse AMQP_URL");
    connection = amqp_new_connection();
    amqp_socket_t *socket = amqp_tcp_socket_new(connection);
    check(amqp_socket_open(socket, to.host, to.port) == AMQP_STATUS_OK, "connect");
    amqp_rpc_reply_t reply =
        amqp_login(connection, to.vhost, 0, FRAME_MAX, 0, AMQP_SASL_METHOD_PLAIN, to.user, to.password);
    check(reply.reply_type == AMQP_RESPONSE_NORMAL, "log in");
    amqp_channel_open(connection, channel);
    answered("open a channel");
    amqp_exchange_declare(connection, channel, amqp_cstring_bytes("logs"), amqp_cstring_bytes("fanout"), 0, 0, 0, 0,
                          amqp_empty_table);
    answered("declare the exchange");
}

static void close_connection(void)
{
    check(amqp_connection_close(connection, AMQP_REPLY_SUCCESS).reply_type == AMQP_RESPONSE_NORMAL, "close");
}

static void publish(void)
{
    static char buffer[INPUT];
    size_t held = 0; /* bytes of an incomplete line */
    ssize_t got;
    while ((got = read(STDIN_FILENO, buffer + held, sizeof buffer - held)) > 0) {
        char *line = buffer, *end = buffer + held + got, *newline = buffer + held;
        while ((newline = memchr(newline, '\n', end - newline))) {
            amqp_bytes_t body = {.len = newline - line, .bytes = line};
            int status = amqp_basic_publish(connection, channel, amqp_cstring_bytes("logs"), amqp_empty_bytes, 0, 0,
                                            NULL, body);
            check(status == AMQP_STATUS_OK, "publish");
            line = ++newline;
        }
        held = end - line;
        check(held < sizeof buffer, "line too long");
        memmove(buffer, line, held);
    }
    check(got == 0 && held == 0, "read whole lines");
}

static amqp_bytes_t bind_queue(void)
{
    amqp_queue_declare_ok_t *queue =
        amqp_queue_declare(connection, channel, amqp_empty_bytes, 0, 0, 1, 0, amqp_empty_table);
    answered("declare a queue");
    amqp_bytes_t name = amqp_bytes_malloc_dup(queue->queue);
    amqp_queue_bind(connection, channel, name, amqp_cstring_bytes("logs"), amqp_empty_bytes, amqp_empty_table);
    answered("bind the queue");
    return name;
}

static void subscribe(int no_ack, const char *stream)
{
    amqp_bytes_t name = stream ? amqp_cstring_bytes(stream) : bind_queue();
    amqp_table_entry_t offset = {.key = amqp_cstring_bytes("x-stream-offset"),
                                 .value = {.kind = AMQP_FIELD_KIND_UTF8, .value.bytes = amqp_cstring_bytes("first")}};
    amqp_table_t arguments = {.num_entries = stream ? 1 : 0, .entries = &offset};
    amqp_basic_qos(connection, channel, 0, PREFETCH, 0);
    answered("set the prefetch count");
    amqp_basic_consume(connection, channel, name, amqp_empty_bytes, 0, no_ack, 0, arguments);
    answered("consume the queue");
    fputs(" [*] Waiting for logs\n", stderr);
}

/* The next frame. If it has not arrived, flushes the output first. */
static amqp_frame_t next_frame(void)
{
    amqp_frame_t frame;
    struct timeval at_once = {0, 0};
    int status = amqp_simple_wait_frame_noblock(connection, &frame, &at_once);
    if (status == AMQP_STATUS_TIMEOUT) {
        check(fflush(stdout) == 0, "write");
        status = amqp_simple_wait_frame(connection, &frame);
    }
    check(status == AMQP_STATUS_OK, "receive");
    return frame;
}

/* Frame by frame: amqp_consume_message would allocate and copy each body. */
static void consume(long count, int no_ack, int bare, const char *stream)
{
    static char output[OUTPUT];
    setvbuf(stdout, output, _IOFBF, sizeof output);
    subscribe(no_ack, stream);
    uint64_t tag = 0, missing = 0;
    for (long received = 0; received != count;) {
        amqp_frame_t frame = next_frame();
        if (frame.frame_type == AMQP_FRAME_METHOD) {
            check(frame.payload.method.id == AMQP_BASIC_DELIVER_METHOD, "expected a delivery");
            tag = ((amqp_basic_deliver_t *)frame.payload.method.decoded)->delivery_tag;
            continue;
        }
        if (frame.frame_type == AMQP_FRAME_HEADER) {
            missing = frame.payload.properties.body_size;
        } else {
            fwrite(frame.payload.body_fragment.bytes, 1, frame.payload.body_fragment.len, stdout);
            missing -= frame.payload.body_fragment.len;
        }
        if (missing > 0) continue;
        if (!bare) putc_unlocked('\n', stdout);
        received++;
        if (!no_ack && tag % ACK_EVERY == 0)
            check(amqp_basic_ack(connection, channel, tag, 1) == AMQP_STATUS_OK, "acknowledge");
        amqp_maybe_release_buffers(connection);
    }
    check(fflush(stdout) == 0, "write");
}

int main(int argc, char **argv)
{
    const char *action = argc > 1 ? argv[1] : "", *stream = NULL;
    long count = -1;
    int option, no_ack = 0, bare = 0;
    optind = 2;
    while ((option = getopt(argc, argv, "n:abs:")) != -1) {
        if (option == '?') return 2;
        if (option == 'n') count = atol(optarg);
        no_ack |= option == 'a';
        bare |= option == 'b';
        if (option == 's') stream = optarg;
    }
    if (strcmp(action, "version") == 0) {
        puts(amqp_version());
        return 0;
    }
    open_connection();
    if (strcmp(action, "publish") == 0) publish();
    else if (strcmp(action, "consume") == 0) consume(count, no_ack, bare, stream);
    else return 2;
    close_connection();
    return 0;
}
