/* Makes syncs slow: see slow_sync_library in disks.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void wait_for(int fd) {
  const char *below = getenv("HOLDFAST_TEST_SLOW_BELOW");
  const char *says = getenv("HOLDFAST_TEST_SLOW_MS");
  if (!below || !says)
    return;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0)
    return;
  path[length] = 0;
  if (strncmp(path, below, strlen(below)))
    return;
  FILE *file = fopen(says, "re");
  if (!file)
    return;
  int milliseconds = 0;
  if (fscanf(file, "%d", &milliseconds) == 1)
    usleep(1000 * milliseconds);
  fclose(file);
}

int fsync(int fd) {
  int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
  int result = real(fd);
  wait_for(fd);
  return result;
}

int fdatasync(int fd) {
  int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
  int result = real(fd);
  wait_for(fd);
  return result;
}
