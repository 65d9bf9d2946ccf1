/* Loaded before the C library: makes the n-th change to a file under a folder fail, or every write
   take half of what it is given.

   A change is a write to, a sync or a renaming of a file whose path begins with the folder. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, SHORT, NO_SPACE, IO_ERROR, KILL };

static char folder[4096];
static int countdown = -1, mode = NONE, seen = 0;

/* The n-th change from now on fails in this way; counts from 1. Returns how many there were. */
int io_faults_arm(const char *path, int n, int how)
{
    int before = seen;
    snprintf(folder, sizeof folder, "%s", path);
    countdown = n;
    mode = how;
    seen = 0;
    return before;
}

static int is_ours(const char *path)
{
    return folder[0] && strncmp(path, folder, strlen(folder)) == 0;
}

static int fd_is_ours(int fd)
{
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0)
        return 0;
    path[length] = 0;
    return is_ours(path);
}

/* What is to happen to this change; NONE for all but the one that was asked for. */
static int turn(int ours)
{
    if (!ours)
        return NONE;
    seen++;
    if (mode == SHORT)
        return SHORT;
    if (countdown <= 0 || --countdown > 0)
        return NONE;
    if (mode == KILL)
        raise(SIGKILL);
    errno = mode == NO_SPACE ? ENOSPC : EIO;
    return mode;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t count)
{
    int how = turn(fd_is_ours(fd));
    if (how == SHORT && count > 1)
        return REAL(write)(fd, data, count / 2);
    return how == NONE || how == SHORT ? REAL(write)(fd, data, count) : -1;
}

int fsync(int fd)
{
    int how = turn(fd_is_ours(fd));
    return how == NONE || how == SHORT ? REAL(fsync)(fd) : -1;
}

int rename(const char *from, const char *to)
{
    int how = turn(is_ours(to));
    return how == NONE || how == SHORT ? REAL(rename)(from, to) : -1;
}
