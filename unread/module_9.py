def function_9(x):
    return x + 9
def function_9(x):
    return x + 9
def function_9(x):
    return x + 9
def function_9(x):
    return x + 9
def function_9(x):
    return x + 9
