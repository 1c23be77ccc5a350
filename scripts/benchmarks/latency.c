/*
 * latency RATE COUNT FILE: writes COUNT lines of 100 bytes to standard output, RATE per second. Each contains the time
 * of its writing. Follows FILE, where the lines must appear in the same order. Prints the latencies to standard error:
 * median, 99th percentile and maximum in microseconds.
 *
 * It waits for a first line, so that the start is not measured. FILE is read every 100 us. A latency can be too long by
 * this time, and by the time that the system needs to wake this process.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

enum { LINE = 101, TICK = 100000 /* ns */ };
static const long long second = 1000000000LL, patience = 60 * 1000000000LL;

static int file;
static long arrived; /* including the first line */
static long long *latencies;

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * second + t.tv_nsec;
}

static void die(const char *what)
{
    fprintf(stderr, "latency: %s\n", what);
    exit(1);
}

/* Whether the line could be written: 0 while the pipe is full. */
static int write_line(long index, long long stamp)
{
    char line[128];
    snprintf(line, sizeof line, "%019lld %09ld %070d\n", stamp, index, 0);
    ssize_t wrote = write(STDOUT_FILENO, line, LINE);
    if (wrote < 0 && errno == EAGAIN) return 0;
    if (wrote != LINE) die("write");
    return 1;
}

/* Records the lines that have appeared. */
static void look(long limit)
{
    static char buffer[LINE * 1000];
    ssize_t got = pread(file, buffer, sizeof buffer, (off_t)arrived * LINE);
    if (got < 0) die("read");
    long long at = now();
    for (char *line = buffer; line + LINE <= buffer + got; line += LINE) {
        long long stamp;
        long index;
        int fields = sscanf(line, "%19lld %9ld", &stamp, &index);
        if (fields != 2 || index != arrived || index > limit || line[LINE - 1] != '\n') die("the lines differ");
        latencies[arrived++] = at - stamp;
    }
}

static void nap(long long duration)
{
    struct timespec t = {0, duration > TICK ? TICK : duration};
    if (duration > 0) nanosleep(&t, NULL);
}

static int ascending(const void *a, const void *b)
{
    long long x = *(const long long *)a, y = *(const long long *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    if (argc != 4) return 2;
    double rate = atof(argv[1]);
    long count = atol(argv[2]);
    latencies = calloc(count + 1, sizeof *latencies);
    file = open(argv[3], O_RDONLY);
    if (rate <= 0 || count <= 0 || !latencies || file < 0) die("rate, count or file is wrong");
    fcntl(STDOUT_FILENO, F_SETFL, O_NONBLOCK);
#ifdef __linux__
    prctl(PR_SET_TIMERSLACK, 1); /* ns; by default sleeps are 50 us longer */
#endif

    long long limit = now() + patience;
    write_line(0, now());
    for (; arrived < 1; nap(TICK)) {
        if (now() > limit) die("the first line did not appear");
        look(0);
    }

    /* The latency of a line that a full pipe delays counts from its due time. Otherwise a stall would count once. */
    int held_up = 0;
    long sent = 0;
    long long start = now(), due = start, last = start;
    while (arrived <= count) {
        long long time = now();
        while (sent < count && due <= time) {
            held_up = !write_line(sent + 1, held_up ? due : time);
            if (held_up) break;
            due = start + (long long)(++sent * second / rate);
            last = time;
        }
        look(sent);
        time = now();
        if (time > last + patience && (held_up || sent == count)) die("lines are missing");
        nap(sent < count && !held_up ? due - time : TICK);
    }
    qsort(latencies + 1, count, sizeof *latencies, ascending);
    fprintf(stderr, "%.1f %.1f %.1f\n", latencies[1 + count / 2] / 1e3, latencies[1 + count * 99 / 100] / 1e3,
            latencies[count] / 1e3);
    return 0;
}
