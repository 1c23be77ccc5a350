/*
 * launch REPORT COMMAND...: runs COMMAND and writes one line to REPORT: its start (monotonic clock, ns), the time until
 * its end (ns), its CPU time (user and system, us), its peak memory (KiB) and its exit status (negative: signal).
 *
 * The driver does not start COMMAND itself: a new process starts with the peak memory of its parent, and a large parent
 * also needs more time to start it. This program is as small as possible.
 *
 * SIGTERM is passed on; SIGUSR1 kills COMMAND.
 */
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

extern char **environ;
static volatile pid_t child;

static void pass_on(int signal) { kill(child, signal == SIGTERM ? SIGTERM : SIGKILL); }

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static long long microseconds(struct timeval t) { return t.tv_sec * 1000000LL + t.tv_usec; }

int main(int argc, char **argv)
{
    if (argc < 3) return 2;
    /* Signals are blocked until COMMAND runs and can receive them. COMMAND itself must start with unblocked signals. */
    sigset_t ours, before;
    sigemptyset(&ours);
    sigaddset(&ours, SIGTERM);
    sigaddset(&ours, SIGUSR1);
    sigprocmask(SIG_BLOCK, &ours, &before);
    struct sigaction action = {.sa_handler = pass_on, .sa_flags = SA_RESTART};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGUSR1, &action, NULL);
    posix_spawnattr_t attributes;
    posix_spawnattr_init(&attributes);
    posix_spawnattr_setsigmask(&attributes, &before);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);

    long long start = now();
    pid_t pid;
    int error = posix_spawnp(&pid, argv[2], NULL, &attributes, argv + 2, environ);
    if (error) {
        fprintf(stderr, "%s: %s\n", argv[2], strerror(error));
        return 1;
    }
    child = pid;
    sigprocmask(SIG_SETMASK, &before, NULL);
    int status;
    struct rusage usage;
    if (wait4(pid, &status, 0, &usage) < 0) return 1;
    long long took = now() - start;

#ifdef __APPLE__
    usage.ru_maxrss /= 1024; /* bytes there, KiB elsewhere */
#endif
    FILE *report = fopen(argv[1], "w");
    if (!report) return 1;
    fprintf(report, "%lld %lld %lld %ld %d\n", start, took, microseconds(usage.ru_utime) + microseconds(usage.ru_stime),
            usage.ru_maxrss, WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status));
    return fclose(report) ? 1 : 0;
}
