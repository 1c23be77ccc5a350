/*
 * delay MILLISECONDS PORT: a proxy that delays the broker at PORT of this machine. Prints its own port.
 *
 * Bytes arrive MILLISECONDS after they were sent, in order and at any rate. Opening a connection has no delay.
 */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CHUNK = 64 << 10, EARLY = 300000 /* ns; a sleep for each of many small chunks would delay them more */ };

struct chunk {
    struct chunk *next;
    long long due;
    ssize_t size; /* 0 or less at the end */
    char bytes[CHUNK];
};

/* A direction of a connection. One thread reads and another writes, so that several chunks are in flight. */
struct direction {
    int from, to;
    pthread_t reader, writer;
    pthread_mutex_t lock;
    pthread_cond_t arrived;
    struct chunk *first, **last;
};

static long long delay; /* ns */
static struct sockaddr_in broker = {.sin_family = AF_INET};

static void check(int ok, const char *operation)
{
    if (ok) return;
    perror(operation);
    exit(1);
}

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void *read_chunks(void *argument)
{
    struct direction *d = argument;
    for (ssize_t got = 1; got > 0;) {
        struct chunk *chunk = malloc(sizeof *chunk);
        check(chunk != NULL, "malloc");
        got = read(d->from, chunk->bytes, CHUNK);
        chunk->due = now() + delay;
        chunk->size = got;
        chunk->next = NULL;
        pthread_mutex_lock(&d->lock);
        *d->last = chunk;
        d->last = &chunk->next;
        pthread_cond_signal(&d->arrived);
        pthread_mutex_unlock(&d->lock);
    }
    return NULL;
}

static struct chunk *next_chunk(struct direction *d)
{
    pthread_mutex_lock(&d->lock);
    while (!d->first) pthread_cond_wait(&d->arrived, &d->lock);
    struct chunk *chunk = d->first;
    d->first = chunk->next;
    if (!d->first) d->last = &d->first;
    pthread_mutex_unlock(&d->lock);
    return chunk;
}

static void *write_chunks(void *argument)
{
    struct direction *d = argument;
    for (ssize_t size = 1; size > 0;) {
        struct chunk *chunk = next_chunk(d);
        long long left = chunk->due - now();
        if (left > EARLY) nanosleep(&(struct timespec){left / 1000000000, left % 1000000000}, NULL);
        size = chunk->size;
        for (ssize_t done = 0, wrote; done < size; done += wrote) {
            wrote = write(d->to, chunk->bytes + done, size - done);
            if (wrote < 0) break; /* the peer has closed; the reader of the other direction passes this on */
        }
        free(chunk);
    }
    shutdown(d->to, SHUT_WR);
    return NULL;
}

static void begin(struct direction *d)
{
    d->last = &d->first;
    setsockopt(d->to, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    check(pthread_create(&d->reader, NULL, read_chunks, d) == 0, "pthread_create");
    check(pthread_create(&d->writer, NULL, write_chunks, d) == 0, "pthread_create");
}

static void *serve(void *argument)
{
    int client = (intptr_t)argument, server = socket(AF_INET, SOCK_STREAM, 0);
    struct direction directions[] = {
        {.from = client, .to = server, .lock = PTHREAD_MUTEX_INITIALIZER, .arrived = PTHREAD_COND_INITIALIZER},
        {.from = server, .to = client, .lock = PTHREAD_MUTEX_INITIALIZER, .arrived = PTHREAD_COND_INITIALIZER}};
    check(connect(server, (struct sockaddr *)&broker, sizeof broker) == 0, "connect");
    for (int i = 0; i < 2; i++) begin(&directions[i]);
    for (int i = 0; i < 2; i++) pthread_join(directions[i].reader, NULL), pthread_join(directions[i].writer, NULL);
    close(client);
    close(server);
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc != 3) return 2;
    delay = atof(argv[1]) * 1e6;
    broker.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    struct sockaddr_in here = broker;
    socklen_t size = sizeof here;
    broker.sin_port = htons(atoi(argv[2]));
    signal(SIGPIPE, SIG_IGN);

    int listener = socket(AF_INET, SOCK_STREAM, 0);
    check(bind(listener, (struct sockaddr *)&here, sizeof here) == 0 && listen(listener, 128) == 0, "listen");
    getsockname(listener, (struct sockaddr *)&here, &size);
    printf("%d\n", ntohs(here.sin_port));
    fflush(stdout);
    for (;;) {
        pthread_t thread;
        int client = accept(listener, NULL, NULL);
        check(client >= 0 && pthread_create(&thread, NULL, serve, (void *)(intptr_t)client) == 0, "accept");
        pthread_detach(thread);
    }
}
