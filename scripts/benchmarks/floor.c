/*
 * The minimum cost of one message, without any library.
 *
 *   floor MESSAGE    one confirmed message: one write up to the publish, then the confirm, then the close. (A correct
 *                    client waits for two more answers, because it does not know the offers of the broker.)
 *   floor            an empty process
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define METHOD(channel, literal) frame(1, channel, literal, sizeof literal - 1)

static char out[8192];
static size_t length;

static void die(const char *what)
{
    fprintf(stderr, "floor: %s\n", what);
    exit(1);
}

static void put(const void *bytes, size_t count)
{
    if (length + count > sizeof out) die("message too long");
    memcpy(out + length, bytes, count);
    length += count;
}

static void frame(char type, char channel, const char *payload, size_t size)
{
    put((char[]){type, 0, channel}, 3);
    put(&(uint32_t){htonl(size)}, 4);
    put(payload, size);
    put("\xce", 1);
}

static void log_in(void)
{
    put("AMQP\0\0\11\1", 8);
    METHOD(0, "\0\12\0\13" "\0\0\0\0" "\5PLAIN" "\0\0\0\14\0guest\0guest" "\5en_US"); /* start-ok */
    METHOD(0, "\0\12\0\37" "\0\1" "\0\2\0\0" "\0\0"); /* tune-ok: one channel, frames of 128 KiB, no heartbeat */
    METHOD(0, "\0\12\0\50" "\1/" "\0\0");             /* connection.open */
    METHOD(1, "\0\24\0\12" "\0");                     /* channel.open */
}

static void publish(const char *message)
{
    METHOD(1, "\0\50\0\12" "\0\0" "\4logs" "\6fanout" "\0" "\0\0\0\0"); /* exchange.declare */
    METHOD(1, "\0\125\0\12" "\0");                                      /* confirm.select */
    METHOD(1, "\0\74\0\50" "\0\0" "\4logs" "\0" "\0");                  /* basic.publish */
    char header[14] = "\0\74";
    uint32_t size = strlen(message);
    memcpy(header + 8, &(uint32_t){htonl(size)}, 4); /* the lower half of eight bytes; no properties follow */
    frame(2, 1, header, sizeof header);
    frame(3, 1, message, size);
}

static void send_to(int broker)
{
    if (write(broker, out, length) != (ssize_t)length) die("write");
    length = 0;
}

/* Skips frames until the expected method. An unexpected close is an error. */
static void await(int broker, uint32_t wanted)
{
    static unsigned char in[65536];
    static size_t held;
    for (;;) {
        size_t size = held < 7 ? 8 : 8 + (in[5] << 8 | in[6]); /* all expected frames are small */
        if (held < size) {
            ssize_t got = read(broker, in + held, sizeof in - held);
            if (got <= 0) die("the broker has closed the connection");
            held += got;
            continue;
        }
        uint32_t method = in[7] << 24 | in[8] << 16 | in[9] << 8 | in[10];
        memmove(in, in + size, held -= size);
        if (method == wanted) return;
        if (method == (10 << 16 | 50) || method == (20 << 16 | 40)) die("refused");
    }
}

int main(int argc, char **argv)
{
    if (argc < 2) return 0;
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    const char *url = getenv("AMQP_URL");
    unsigned short port;
    if (!url || sscanf(url, "amqp://guest:guest@127.0.0.1:%hu", &port) != 1) die("AMQP_URL: not a local broker");
    address.sin_port = htons(port);

    int broker = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    setsockopt(broker, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(broker, (struct sockaddr *)&address, sizeof address)) die("connect");
    log_in();
    publish(argv[1]);
    send_to(broker);
    await(broker, 60 << 16 | 80); /* basic.ack */
    METHOD(0, "\0\12\0\62" "\0\310" "\0" "\0\0\0\0"); /* connection.close */
    send_to(broker);
    await(broker, 10 << 16 | 51); /* close-ok */
    return 0;
}
