/* LD_PRELOAD: after each successful fsync or fdatasync of a file in DIRECTORY, DIRECTORY/.synced holds a copy of what
 * was in it when the sync was asked for. Nothing happens where there is no DIRECTORY/.synced.
 * A sync of DIRECTORY itself removes the copies of files that are no longer in it.
 * A power cut is then: kill all, and take the copies. What was never synced is gone; an unlink that was not is undone. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

static int copy(int fd, const char *to) {
    struct stat found;
    off_t at = 0;
    int out = open(to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (out < 0 || fstat(fd, &found) != 0)
        return -1;
    /* Through the same descriptor: to close another one of the file would drop its locks. */
    while (at < found.st_size && sendfile(out, fd, &at, found.st_size - at) > 0)
        ;
    close(out);
    return at == found.st_size ? 0 : -1;
}

static void forget_unlinked(const char *directory) {
    char path[PATH_MAX * 2];
    snprintf(path, sizeof path, "%s/.synced", directory);
    DIR *copies = opendir(path);
    struct dirent *entry;
    while (copies != NULL && (entry = readdir(copies)) != NULL) {
        snprintf(path, sizeof path, "%s/%s", directory, entry->d_name);
        if (entry->d_name[0] != '.' && access(path, F_OK) != 0) {
            snprintf(path, sizeof path, "%s/.synced/%s", directory, entry->d_name);
            unlink(path);
        }
    }
    if (copies != NULL)
        closedir(copies);
}

static int synced(int fd, const char *name) {
    int (*sync_)(int) = dlsym(RTLD_NEXT, name);
    char link[64], path[PATH_MAX], lock[PATH_MAX + 32], fresh[PATH_MAX + 32], kept[PATH_MAX + 32];
    struct stat found;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0 || fstat(fd, &found) != 0)
        return sync_(fd);
    path[length] = 0;
    if (S_ISDIR(found.st_mode)) {
        int result = sync_(fd);
        if (result == 0)
            forget_unlinked(path);
        return result;
    }
    char *base = strrchr(path, '/');
    if (base == NULL)
        return sync_(fd);
    snprintf(lock, sizeof lock, "%.*s/.synced/.lock", (int)(base - path), path);
    snprintf(fresh, sizeof fresh, "%.*s/.synced/.fresh", (int)(base - path), path);
    snprintf(kept, sizeof kept, "%.*s/.synced/%s", (int)(base - path), path, base + 1);
    int locked = open(lock, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (locked < 0)
        return sync_(fd);
    flock(locked, LOCK_EX);
    int copied = copy(fd, fresh), result = sync_(fd);
    if (result == 0 && copied == 0)
        rename(fresh, kept);
    close(locked);
    return result;
}

int fsync(int fd) { return synced(fd, "fsync"); }
int fdatasync(int fd) { return synced(fd, "fdatasync"); }
