// One binary for every x86-64: the loader picks the widest version (v3: AVX2, v4: AVX-512).
//
// A function marked IMF_MULTIVERSION is compiled once per version; what it calls has to be
// IMF_INLINE to be compiled along with it.

#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define IMF_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define IMF_MULTIVERSION
#endif

#define IMF_INLINE inline __attribute__((always_inline))
